"""What executes a plan: the Ray executor, the engines, and the launchers of other frameworks."""
