"""A tiny world in which what a LoRA learns can be measured in minutes.

It is made of drawings, and of a judge that reads them.
"""
