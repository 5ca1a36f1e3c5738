"""Programs that `distill export` puts beside an ONNX file; they need no part of the toolkit."""
