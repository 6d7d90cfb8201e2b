"""Denoising made visible: `dqx generate`. What is drawn is made of frames (`dqx/diffusion/frames.py`).

    command.py    the command: which model, which settings, one answer or two side by side
    drawing.py    from a frame to what rich prints: masks, tokens in the colour of their probability, a line of numbers
    pieces.py     token ids to text, token by token
    picture.py    a screen as an SVG file

`MODEL` is opened by `dqx/study/source.py`.
"""
