"""Whether a page can be read and used: contrast of its texts, names of its controls, its outline."""

from __future__ import annotations

from typing import Any

# Every visible text with its colour and the grounds below it, as [text, colour, [grounds]].
TEXTS = """() => {
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({visibilityProperty: true})) continue;
    if (element.closest('.unseen, .skip, noscript, script, :disabled')) continue;
    const grounds = [];
    for (let at = element; at; at = at.parentElement) grounds.push(getComputedStyle(at).backgroundColor);
    const style = getComputedStyle(element);
    found.push([walker.currentNode.data.trim(), element instanceof SVGElement ? style.fill : style.color, grounds]);
  }
  return found;
}"""

# Names of controls, references between elements, and the outline, as problems in words.
PROBLEMS = """() => {
  const problems = [];
  const all = [...document.querySelectorAll('*')];
  const seen = all.filter(e => e.checkVisibility());
  const ids = all.map(e => e.id).filter(Boolean);
  ids.filter((id, i) => ids.indexOf(id) !== i).forEach(id => problems.push('id twice: ' + id));
  for (const name of ['aria-describedby', 'aria-labelledby', 'aria-controls', 'for']) {
    for (const e of document.querySelectorAll('[' + name + ']')) {
      e.getAttribute(name).split(' ').filter(id => !document.getElementById(id)).forEach(id => problems.push(name + ': ' + id));
    }
  }
  for (const e of seen.filter(e => e.matches('input, textarea, select'))) {
    if (![...e.labels].some(label => label.textContent.trim())) problems.push('no label: ' + e.id + e.name);
  }
  for (const e of seen.filter(e => e.matches('button, summary, a'))) {
    if (!e.textContent.trim()) problems.push('no name: ' + e.outerHTML);
  }
  for (const e of seen.filter(e => e.matches('[role=group], [role=img], main, section, form, nav'))) {
    if (!e.getAttribute('aria-label')) problems.push('no name: ' + e.tagName + '.' + e.className);
  }
  for (const e of seen.filter(e => e.matches('fieldset'))) {
    if (!e.querySelector('legend')?.textContent) problems.push('no legend');
  }
  for (const e of seen.filter(e => e.matches('svg'))) {
    if (e.getAttribute('role') !== 'img' && e.getAttribute('aria-hidden') !== 'true') problems.push('a drawing without a role');
  }
  const levels = seen.filter(e => /^H[1-6]$/.test(e.tagName)).map(e => Number(e.tagName[1]));
  levels.forEach((level, i) => {
    if (level > (levels[i - 1] ?? 0) + 1) problems.push('a heading of level ' + level + ' after one of ' + levels[i - 1]);
  });
  if (seen.filter(e => e.tagName === 'MAIN').length !== 1) problems.push('not one main');
  if (seen.filter(e => e.tagName === 'H1').length !== 1) problems.push('not one h1');
  if (!document.documentElement.lang || !document.title) problems.push('no language or title');
  if (seen.some(e => e.tabIndex > 0)) problems.push('a tab order of its own');
  return problems;
}"""


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast of two opaque colours (WCAG 2, relative luminance)."""

    def luminance(colour: tuple[float, ...]) -> float:
        parts = [part / 255 for part in colour[:3]]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def colour_of(text: str) -> tuple[float, ...]:
    """rgb(...) or rgba(...) as numbers, alpha last."""
    parts = [float(part) for part in text[text.index("(") + 1 : -1].split(",")]
    return (*parts[:3], parts[3] if len(parts) > 3 else 1.0)


def faint(texts: list[Any]) -> list[str]:
    """Texts with a contrast below 4.5 to their ground."""
    found = []
    for text, colour, grounds in texts:
        ground: tuple[float, ...] = (255, 255, 255, 1)
        for layer in map(colour_of, reversed(grounds)):
            ground = (*(layer[3] * layer[i] + (1 - layer[3]) * ground[i] for i in range(3)), 1)
        if contrast(colour_of(colour), ground) < 4.5:
            found.append(f"{text[:40]}: {colour} on {ground}, {contrast(colour_of(colour), ground):.2f}")
    return found
