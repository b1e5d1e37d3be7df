"""Generate with the embedded models and see what speculation did.  Run: python examples/01_generate.py"""

import draftwing

model = draftwing.load("tiny", draft="tiny")
prompt = model.tokenizer("def read_lines(path):\n", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=64, return_dict_in_generate=True)

print(model.tokenizer.decode(output.sequences[0]))
figures = output.statistics
print(f"\n{figures.num_tokens} tokens in {figures.num_cycles} target passes: tau {figures.acceptance_length:.2f}")
print("conditional acceptance by depth:", [round(rate, 2) for rate in figures.acceptance_rate])
print("seconds:", {stage: round(seconds, 3) for stage, seconds in figures.seconds.items()})
