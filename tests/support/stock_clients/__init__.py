"""Programs of other people that speak OpenAI's API, as they come: in an environment of their own, told only a URL.

environment.py makes it; each other file is run by its python and says in JSON what it saw. Nothing in it is ours.
"""
