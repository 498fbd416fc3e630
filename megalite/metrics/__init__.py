"""What a run says about itself: sinks for figures, the progress line, device figures."""
