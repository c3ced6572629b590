"""The intermediate representation: tasks, edges, device groups, layouts, the graph, its text form, its verifier."""
