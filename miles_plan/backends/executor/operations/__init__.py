"""How each kind of task becomes calls on engines: one file a family, the driver's side and the functions that run in actors."""
