"""The fine-tuning recipe as a program: arguments, data, templates, the run, what it leaves behind."""
