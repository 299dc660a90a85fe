"""The explorer: `veena-lens explore`. Look, Lens, Patch, Steer, Neurons and Pairs in one page on the own machine."""
