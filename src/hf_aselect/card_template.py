"""The text of a model card, for the Hub's `ModelCard.from_template`. In the code, which travels with a model."""

TEMPLATE = """\
{%- macro table(head, rows) -%}
| what | {{ head }} |
| --- | --- |
{%- for name, value in rows.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{%- endmacro -%}
---
{{ card_data }}
---

# {{ name }}

A diffusion transformer (DiT) {{ task.does }}, made with hf_aselect. A DiT learned to generate pictures; its tokens \
at the right noise level, the *timestep*, also tell what is in one.

## The timestep

{{ how }}

{{ table("value", choice) }}
{%- if facts.confidence is not none %}

**How sure.** {{ "{:.0%}".format(facts.confidence) }} of resamples of the pictures choose this timestep or one close \
to it{% if stopped_by %}; {{ stopped_by }}{% endif %}.
{%- for warning in facts.warnings %}
{{ "\n" if loop.first }}- {{ warning }}
{%- endfor %}
{%- endif %}
{%- if facts.figure %}

![Criterion over the timestep]({{ facts.figure }})
{%- endif %}
{%- if results %}

## Results

{{ table(metric, results) }}
{%- if command %}

Command: `{{ command }}`
{%- endif %}
{%- endif %}

## Use

{% if facts.adapter_of -%}
```python
import hf_aselect  # registers the model with the Auto classes
from peft import PeftModel
from transformers import AutoConfig, {{ auto }}

folder = "{{ folder }}"{{ "" if facts.repo_id else "  # this folder, or the adapter's id on the Hub" }}
config = AutoConfig.from_pretrained(folder)  # timestep, tap, classes and sizes of the head
model = {{ auto }}.from_pretrained("{{ facts.adapter_of }}", config=config)
model = PeftModel.from_pretrained(model, folder)
```
{%- else -%}
{% set imports = ["AutoImageProcessor", auto] if facts.has_processor else [auto] -%}
```python
import hf_aselect  # registers the model with the Auto classes
from transformers import {{ imports | join(", ") }}{{ ", pipeline" if task.verb and facts.has_processor }}

folder = "{{ folder }}"{{ "" if facts.repo_id else "  # this folder, or the model's id on the Hub" }}
model = {{ auto }}.from_pretrained(folder)
{%- if facts.has_processor %}
processor = AutoImageProcessor.from_pretrained(folder)
{%- if task.verb %}
{{ task.verb }} = pipeline("{{ facts.task }}", model=model, image_processor=processor)
{%- endif %}
{%- endif %}
```

Without hf_aselect, where torch{% if facts.needs_diffusers is false %} and transformers{% else %}, transformers and \
diffusers{% endif %} are installed, the code beside the weights does the same; `trust_remote_code` \
says that it may run:

```python
from transformers import {{ imports | join(", ") }}

folder = "{{ folder }}"
model = {{ auto }}.from_pretrained(folder, trust_remote_code=True)
{%- if facts.has_processor %}
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
{%- endif %}
```
{%- endif %}
{%- if training %}

## Training

{{ table("value", training) }}
{%- endif %}
{%- if facts.limits or is_non_commercial %}

## Limits
{%- if is_non_commercial %}

**Not for commercial use**, as the licence of the weights that it was made from says.
{%- endif %}
{%- if facts.limits %}

{{ facts.limits }}
{%- endif %}
{%- endif %}

## Source

That a timestep can be chosen without labels is A-SelecT's idea (Liu et al., CVPR 2026 Findings,
[arXiv 2603.25758](https://arxiv.org/abs/2603.25758)):

```bibtex
@misc{aselect,
  title = {A-SelecT},
  author = {Liu and others},
  year = {2026},
  eprint = {2603.25758},
  archivePrefix = {arXiv}
}
```

{{ yours }}
"""
