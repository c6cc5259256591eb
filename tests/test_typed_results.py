"""The guard against typed results: a measured number is printed by the code that has it.

Looked at: Markdown cells of notebooks, the prose that their code gives to `say`, to `save_figure` or to a variable that
is called caption or alt, and README, CHANGELOG and CONTRIBUTING outside generated blocks. Decimals, percentages and
intervals are taken for results unless they are one of these: part of code, a formula, a link or a name; in a sentence
that names the paper they are from, or in a row of a table that does, itself or in the table's head; or a definition.
"""

import ast
import re
from collections.abc import Iterator

import nbformat
import pytest

from llama_long_utils.paths import REPOSITORY
from tools.sequence import delivered

RESULT = re.compile(
    r"\[[-+−±]?\d[\d.,]*, [-+−±]?\d[\d.,]*\]"  # an interval
    r"|(?<![\w.])[-+−±]?\d[\d,]*\.\d+(?![\d.]*\.\d)"  # a decimal
    r"|(?<![\w.])[-+−±]?\d[\d,]*(?=( to \d+)? ?(%|percent|points?\b|nats?\b|times (as|more|less|faster|slower)))"
)
NOT_READ = re.compile(
    r"(?s)```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]+\$|\]\([^)]*\)|https?://\S+|<!-- (\w+) -->.*?<!-- /\1 -->"
)
CITED = re.compile(
    r"arXiv:\d{4}\.\d{5}|\b(Tables?|Figures?) \d+[a-z]?(?![\d.])|[Ss]ection \d|[Aa]ppendix [A-Z]|[Ee]quations? \d"
)
SENTENCE_ENDS = re.compile(r"(?<=[.!?:])[\")*]*\s+(?=[^a-z])|\n(?=\s*[-*\d])")
NAMES = re.compile(
    r"Llama[- ]3\.\d|Qwen2\.5|Python 3\.\d+|Apache-2\.0|CC[- ]BY(-SA)?[- ]\d\.\d|SQuAD 2\.0|GPT-3\.5|Claude[- ]1\.3"
    r"|[Vv]ersion \d+\.\d+|[Ff]igures? \d+\.\d+( (and|to) \d+\.\d+)?|\d+(\.\d+)?[BMK]\b( parameters| tokens)?"
)
PAPER = re.compile(r"[^.!?]*\b[Tt]he paper\b([^.!?]|\.\d)*")  # a sentence about it
# What numbers are by definition, with the reason. The words around them must be these.
DEFINITIONS = {
    r"switch(es)? (at|after) \d+%|the switch at \d+% costs|of which is at 95%": "arms of notebook 12",
    r"95%": "how wide intervals are",
    r"1\.1 GB": "size of a download",
    r"\d+\.\d+ (million|billion) parameters": "size of a model",
    r"off by up to 0\.4%": "rounding to eight significant bits",
    r"NF4, 4\.127 bits each": "four bits and their block's share of a scale",
    r"the logits alone would take 4\.2 GB": "a product of three numbers in the same sentence",
    r"leaves 8% of the memory": "the planner's reserve",
    r"\*\*lean\*\* 40% of it": "the limit that a plan was given",
    r"its backward pass 2\.5 times as much": "operations of attention: five products after two",
    r"share less than 5% with": "the limit that texts are held out by",
    r"quote in 60% of their sequences against 35%": "presets' self_quoting_share",
    r"own training 60% did": "self_quoting_share of the tiny base's recipe",
    r"[Cc]hance (is|of) 25%": "one of four choices",
    r"tell 50% from 51%": "an exercise asks for it",
    r"must agree to 0\.02 nat and ROUGE-L to 8 points": "the limits of a check",
}


def typed_results(text: str) -> list[str]:
    """Numbers in a text of Markdown that look measured, each with the words around it."""
    found = []
    for paragraph in re.split(r"\n\s*\n", NOT_READ.sub(lambda gone: " " if "](" not in gone[0] else "]", text)):
        head, *rows = paragraph.strip().splitlines() or [""]
        parts = [head, *rows] if head.startswith("|") else SENTENCE_ENDS.split(paragraph)
        whole_table = head.startswith("|") and CITED.search(head)
        for part in parts:
            if whole_table or CITED.search(part):
                continue
            clean = part
            for known in (NAMES, PAPER, *DEFINITIONS):
                clean = re.sub(known, lambda allowed: "x" * len(allowed[0]), clean)
            found += [part[max(0, hit.start() - 50) : hit.end() + 20].strip() for hit in RESULT.finditer(clean)]
    return found


def prose(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """Every text of a notebook that a person typed for a reader."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            yield cell.source
            continue
        for node in ast.walk(ast.parse(cell.source)):
            parts = []
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("say", "save_figure"):
                parts = [*node.args, *(word.value for word in node.keywords)]
            elif isinstance(node, ast.Assign | ast.AugAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                parts = [node.value] if getattr(target, "id", "") in ("caption", "alt") else []
            yield "\n\n".join(text for text in map(_typed, parts) if " " in text)  # and not a figure's name or number


def _typed(node: ast.expr) -> str:
    """The letters of a string as typed, without what an f-string computes."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


@pytest.mark.parametrize("one", delivered(), ids=lambda one: one.slug)
def test_no_notebook_has_a_typed_result(one):
    found = [result for text in prose(nbformat.read(one.path, as_version=4)) for result in typed_results(text)]
    assert not found, "print them by the code that has them:\n" + "\n".join(found)


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_no_page_has_a_typed_result(name):
    assert typed_results((REPOSITORY / name).read_text("utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "It is 0.16 nat better than the base.",
        "A lead of 22 [14, 30] points.",
        "The base finds 35% of them.",
        "It costs −0.083 [-0.104, -0.062] at the end.",
        "Twice, in 1.97 of them: see [notebook 6](06_x.ipynb) and Figure 6.1.",
        "It is 3 times as fast, and 12 points ahead.",
        "The table in our Figure 13.2 says 2.83.",
        "5 percent of the texts",
        "The paper's ABF keeps to 94% (Figure 5b). Ours keeps to 31%.",
        "Here it is 0.16 nat better. See arXiv:2309.16039 for theirs.",
        "Published (Table 3):\n\n| arm | nat |\n|---|---|\n| ours | 0.16 |",
        "| arm | score |\n|---|---|\n| theirs (Table 3) | 91.5 |\n| ours | 18.5 |",
    ],
)
def test_a_typed_result_is_found(text):
    assert len(typed_results(text)) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "Llama 3.1 8B has 8 billion parameters (Figure 13.2); Python 3.11 or newer.",
        "The paper finds 45.3% to 47.8% (Table 1).",
        "YaRN (arXiv:2309.00071) asks for a ramp from 1.0 to 32.0.",
        "With `learning_rate = 0.002` and $\\beta = 0.45$, from 4,096 to 32,768 tokens.",
        "95% intervals over 24 documents. The window grows from 512 to 4,096 tokens.",
        "<!-- headlines -->\n- ahead by 0.05 nat\n<!-- /headlines -->",
        "[arXiv](https://arxiv.org/abs/2309.16039) and version 0.1.0",
        "our own Llama of 4.3M parameters",
        "| mix (Table 7) | QuALITY |\n|---|---|\n| its own | 75.5 |",
    ],
)
def test_a_definition_a_name_and_a_cited_number_are_no_typed_results(text):
    assert typed_results(text) == []


def test_captions_and_alt_texts_are_read_where_they_are_typed():
    code = (
        'caption = f"Figures, {origin}. Ours leads by 0.16 nat."\ncaption += " By 3%."\nalt = "It is 12 points ahead."'
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    assert [len(typed_results(text)) for text in prose(notebook) if text] == [1, 1, 1]
