"""`featray report`: which layer of the model to use, from the features that an output holds.

The measures are pure functions: arrays in, dataclasses out. They read no output and print nothing.
"""
