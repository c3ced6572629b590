"""The Ray executor: it interprets a plan's task graph, one actor a GPU, and survives the death of anything in it."""
