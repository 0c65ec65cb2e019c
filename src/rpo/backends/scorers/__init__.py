"""Reward models and what else looks at finished pictures, loaded with transformers and safetensors from documented weights."""
