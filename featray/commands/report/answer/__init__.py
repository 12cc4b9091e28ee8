"""From features and labels to the parts of the page that need labels."""
