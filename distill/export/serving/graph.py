"""Names what is in pictures: python serve.py PICTURE...; needs onnxruntime and pillow."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"))
classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
for name in sys.argv[1:]:
    picture = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    (logits,) = session.run(["logits"], {"images": np.asarray(picture)[None]})[0]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)[:3]
    print(name, *(f"{classes[i]} {shares[i]:.1%}" for i in best), sep="\t")
