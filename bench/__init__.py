"""The benchmark: this service beside what one would use instead, on a fake OpenAI, in one run and in turn.

`python -m bench` runs the scenarios, writes the figures, the table and the plots. How to read them: bench/README.md.
"""
