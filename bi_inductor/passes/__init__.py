"""Rewrites of the Dynamo graph that run before AOTAutograd."""
