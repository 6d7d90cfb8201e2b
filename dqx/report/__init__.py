"""What runs have to say: tables in the terminal, and reports of many runs.

tables.py      everything that is shown as a table: of one run, of a sweep, of groups of runs
terminal.py    one run, or a sweep, in the terminal
gather.py      runs sorted into what one table can hold; seeds make one cell
content.py     what a report says, in whichever format
published.py   the published tables (qdlm_tables.yaml), cell by cell beside ours
markdown.py, latex.py, page.py   a report as Markdown, LaTeX, one HTML page (templates/)
figures/       what is drawn
wandb/         the record in Weights & Biases
command.py     dqx report
compare.py     dqx compare

What was run is put into words by `dqx/record/words.py`.
"""
