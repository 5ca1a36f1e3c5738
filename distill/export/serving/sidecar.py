"""Names what is in pictures: python serve.py PICTURE...; needs onnxruntime and pillow."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(Path(__file__).with_name("model.onnx"))
steps = json.loads(Path(__file__).with_name("preprocessing.json").read_text(encoding="utf-8"))
size, classes = steps["center_crop"], steps["classes"]
for name in sys.argv[1:]:
    picture = ImageOps.exif_transpose(Image.open(name)).convert("RGB")
    scaled = [steps["resize_shorter_side"] * side // min(picture.size) for side in picture.size]
    left, top = (round((side - size) / 2) for side in scaled)
    picture = picture.resize(scaled, Image.Resampling.BILINEAR)
    picture = picture.crop((left, top, left + size, top + size))
    images = (np.asarray(picture)[None] / 255 - steps["mean"]) / steps["std"]
    images = images.transpose(0, 3, 1, 2).astype(np.float32)
    (logits,) = session.run(["logits"], {"images": images})[0]
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares)[:3]
    print(name, *(f"{classes[i]} {shares[i]:.1%}" for i in best), sep="\t")
