"""Knowledge distillation for image classifiers."""
