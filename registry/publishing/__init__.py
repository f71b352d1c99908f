"""From a trained adapter to a release."""
