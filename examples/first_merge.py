"""A first merge, from the plan to scores: two minutes on small models. first_merge.ipynb is the same as a notebook.

Run it in a clone that has been set up (`make demo`, or `pip install -e '.[demo]'`): `python examples/first_merge.py`.
What it makes lies in first-merge/ then. `python tools/notebook.py examples/first_merge.py` makes the notebook of it.
"""

# %% [markdown]
# # A first merge
#
# A vision-language model that can see is merged with a language model that can calculate. Both are small and come with
# the repository, so that all of this runs anywhere in two minutes; with models from the hub it is the same, with
# `owner/name` in the place of a folder.
#
# The world of these models is two handwritten digits in a picture, and questions about them. The VLM was taught
# arithmetic on 18 of the 100 pairs of digits, the language model on all of them, in words. Both grew from one base.

# %%
import random
from pathlib import Path

import altair as alt
from PIL import Image
from transformers import AutoProcessor
from transformers.utils.logging import disable_progress_bar

import polymerge as pm
from polymerge.demo.after_merging import write_questions
from polymerge.demo.digit_questions import draw_questions
from polymerge.demo.shipped import shipped_models
from polymerge.demo.world import load_handwriting, split_pairs

alt.renderers.enable("png")  # charts as pictures: they need no network
disable_progress_bar()
models = shipped_models()
vlm, reason, base = (str(models / name) for name in ("vlm", "reason", "base"))
work = Path("first-merge")


# %% [script]
def show(result) -> None:
    """Print a table, or write a picture: what a notebook shows by itself."""
    if hasattr(result, "save"):
        show.pictures = getattr(show, "pictures", 0) + 1
        file = work / f"picture-{show.pictures}.png"
        work.mkdir(exist_ok=True)
        result.save(file)
        print(file)
    elif hasattr(result, "rows"):
        for row in result.rows()[:20]:
            print("  ".join(f"{name}: {value}" for name, value in row.items() if value is not None))
    else:
        print(result)


# %% [markdown]
# ## What are they, and do they fit?
#
# Only headers and configs are read for this.

# %%
show(pm.inspect(vlm, reason))

# %% [markdown]
# ## The plan
#
# The recipe adds half of what the language model has learned since the base to the VLM's text tower. `plan` says what
# becomes of every tensor, and why, before anything is computed.

# %%
recipe = pm.Recipe(
    "task_arithmetic",
    base_model=base,
    models=(pm.ModelEntry(vlm, {"weight": 1.0}), pm.ModelEntry(reason, {"weight": 0.5})),
    parts=("text",),
)
plan = pm.plan(recipe)
print(plan.counts())

# %%
show(plan)

# %% [markdown]
# Do the two deltas pull at each other? Of two that have nothing to do with each other, the signs differ at half of all
# entries.

# %%
overlap = pm.overlap(plan, svd=False)
print(f"signs differ at {overlap.totals[0].conflict:.1%} of the entries that both change")

# %%
show(overlap.plot("sign_conflict"))

# %% [markdown]
# ## The merged model in memory
#
# `live` gives the merged model as transformers has it, and nothing is written. Here is a picture, and a question about
# two digits whose arithmetic the VLM was never taught.

# %%
_, scans = load_handwriting(1)
questions = draw_questions(split_pairs(1), scans, 1, pictures=1)
unseen = [question for question in questions if question.group == "unseen"]
asked = next(question for question in unseen if question.kind == "sum" and question.answer == "11")
picture = write_questions([asked], work / "asked").with_name("0.png")
print(asked.prompt, "- the answer is", asked.answer)

# %%
show(Image.open(picture).resize((128, 128), Image.Resampling.NEAREST))


# %%
processor = AutoProcessor.from_pretrained(vlm)


def answer(model) -> str:
    content = [{"type": "image"}, {"type": "text", "text": asked.prompt}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[Image.open(picture)], text=[text], return_tensors="pt").to(model.dtype)
    said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


with pm.live(plan) as merged:
    for weight in (0.0, 0.5, 1.0):
        one, other = recipe.models
        merged.set(pm.plan(pm.Recipe(
            recipe.merge_method, (one, pm.ModelEntry(other.model, {"weight": weight})),
            base_model=recipe.base_model, parts=recipe.parts,
        )))  # fmt: skip
        print(f"weight {weight:g}: {answer(merged.model)}")

# %% [markdown]
# ## Choosing the weight
#
# AdaMMS chooses without labels: it takes the weight at which the fewest answers differ from those at the weights beside
# it. We know the right answers here, so the second curve says what the choice was worth.

# %%
some = random.Random(1).sample(questions, 200)
prompts = write_questions(some, work / "some")
options = pm.SearchOptions(
    vary=[pm.Knob("weight", values=(0.25, 0.5, 0.75, 1.0, 1.25))],
    keep_template_weight=True,
    scoring=pm.Scoring("exact", choose=False),
    generation=pm.Generation(max_new_tokens=3, batch_size=50),
    force=True,
)
found = pm.search(recipe, pm.PromptSource(prompts, samples=100), work / "search", options)
show(found)

# %%
show(found.plot())

# %% [markdown]
# ## The merge, written and verified
#
# The folder gets its name when the checkpoint is complete and loads: no tensor missing, nothing that is not a number.

# %%
merged = pm.merge(found.recipe, work / "merged", force=True)
show(merged.verification)

# %% [markdown]
# ## Before and after
#
# The same questions for both models; the intervals are those of a bootstrap over pairs of answers to one question. The
# merged model gains where it is asked for arithmetic that the VLM never saw. What it loses in perception is within
# noise on so few questions; the demo (`make demo`) asks more of them, and there it is not.

# %%
tasks = {}
for group in ("perception", "unseen"):
    own = [question for question in questions if question.group == group]
    tasks[group] = write_questions(random.Random(1).sample(own, 300), work / group)
scores = []
for name, model in (("before", vlm), ("after", merged.folder)):
    how = {"scorer": "exact", "max_new_tokens": 3, "generation": options.generation}
    scores.append(pm.evaluate(model, tasks, work / name, name=name, force=True, **how))
compared = pm.compare(scores, template="before")
for gain in compared.gains:
    print(f"{gain.column}: {gain.value:+.1f} points, 95 % interval {gain.low:+.1f} to {gain.high:+.1f}")

# %%
show(compared.plot())

# %% [markdown]
# `pm.report` puts all of it on one page, to keep or to send.

# %%
page = pm.report([merged, found, *scores], work / "report.html").page
print(page)
