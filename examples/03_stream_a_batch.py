"""Stream a ragged batch: every cycle hands out the tokens it committed.  Run: python examples/03_stream_a_batch.py"""

import draftwing

model = draftwing.load("tiny", draft="tiny")
model.tokenizer.padding_side = "left"
prompts = ["import os\n", "class Stack:\n    def push(self, item):\n", "def mean(values):\n"]
batch = model.tokenizer(prompts, return_tensors="pt", padding=True)

texts = list(prompts)
for committed in model.stream(**batch, max_new_tokens=32, temperature=0.8, seed=[1, 2, 3]):
    for row, tokens in enumerate(committed.tokens):
        texts[row] += model.tokenizer.decode(tokens)
        print(f"row {row}: {committed.num_accepted[row]} drafted and accepted, {len(tokens)} committed")
print("\n---\n".join(texts))
