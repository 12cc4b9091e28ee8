"""From the features of an output to the parts of the page that need no labels."""
