"""Networks of our own: every public function of a module here is a model of its name."""
