"""From the features and the table `scans` to how well facts of the acquisition can be read off each layer."""
