"""How results look in a notebook."""

from dqx.evaluate.results import DocumentRow, TaskResult


def test_a_result_is_shown_in_a_line_and_as_a_table() -> None:
    rows = [DocumentRow(f"sums/{i}", float(i < 47)) for i in range(48)]
    result = TaskResult("nano_sums", "math", "exact_match,<answer>", 47 / 48, 48, rows, seconds=12.34)
    assert repr(result) == "TaskResult(nano_sums: 97.9 % exact_match,<answer>, n=48, 12.3 s)"
    assert "<td>97.9 % exact_match,&lt;answer&gt;</td><td>48</td>" in result._repr_html_()
    text = TaskResult("nano_text", "text", "nll", 1.23456, 2)
    assert repr(text) == "TaskResult(nano_text: 1.235 nats per token, n=2, 0.0 s)"
