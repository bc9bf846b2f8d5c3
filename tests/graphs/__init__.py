"""What the shipped workflows share; tests/<technique>/graph.py describes them, make_workflows.py builds them."""
