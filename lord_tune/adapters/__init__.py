"""PEFT adapters on the factors: attach, route, fold, load."""
