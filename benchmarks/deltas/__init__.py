"""Full fine-tunes of SmolLM2-135M-Instruct, and how near they are as differences to the base."""
