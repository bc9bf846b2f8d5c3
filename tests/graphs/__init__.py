"""The shipped workflows, described by names; make_workflows.py builds them in the graph editor."""
