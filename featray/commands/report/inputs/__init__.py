"""What the report needs from the scans themselves or from the model: baselines, slices, random weights."""
