"""Training, drawing and measuring: everything that works on a run folder."""
