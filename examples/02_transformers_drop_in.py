"""Speed up a model that transformers loaded, changing one argument.  Run: python examples/02_transformers_drop_in.py"""

from transformers import AutoModelForCausalLM, AutoTokenizer

import draftwing
from draftwing.embedded import EMBEDDED

folder = EMBEDDED / "target"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("def main(argv):\n", return_tensors="pt")

fast_generate = draftwing.custom_generate("tiny")  # once; it loads the head at its first use
plain = model.generate(**prompt, max_new_tokens=48, do_sample=False)
fast = model.generate(**prompt, max_new_tokens=48, do_sample=False, custom_generate=fast_generate)
print(tokenizer.decode(fast[0]))
print("the same tokens:", plain.tolist() == fast.tolist())
