"""Generate in this process, without a server:  python examples/offline.py MODEL"""

import sys

from octavo_engine import LLM, SamplingParams

llm = LLM(model=sys.argv[1])

prompts = ["The capital of France is", "A haiku about the sea:\n"]
for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24)):
    print(output.prompt, "→", output.outputs[0].text)

answer = llm.chat([{"role": "user", "content": "What is the capital of Italy?"}], SamplingParams(max_tokens=32))
print(answer[0].outputs[0].text)
