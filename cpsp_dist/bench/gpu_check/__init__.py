"""`cpsp-dist gpu-check`: what only a real GPU shows.

What looks at a GPU belongs here, a function for each part, by what it uses: a step, the objectives, trainings.
"""
