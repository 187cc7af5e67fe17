// Elements. What a model or a person wrote only ever becomes text.

export const element = id => document.getElementById(id);

export function make(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  made.className = className ?? "";
  return made;
}

export function makeButton(text, onClick, label = text) {
  const button = make("button", text);
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.onclick = onClick;
  return button;
}

export function picture(source, alt) {
  const image = make("img");
  image.src = source;
  image.alt = alt;
  return image;
}

// A little Markdown: blocks of code, lists, headings, bold and code within a line. All else stays as it is written.
export function rendered(text) {
  const result = document.createDocumentFragment();
  text.split(/^```.*$/m).forEach((part, number) => {
    const content = part.replace(/^\n|\n$/g, "");
    if (number % 2) {
      result.append(make("pre", content));
      return;
    }
    let list = null;
    for (const line of content.split("\n")) {
      const [, mark, item] = line.match(/^\s*([-*]|\d+[.)])\s+(.*)$/) ?? [];
      const kind = mark && (/\d/.test(mark) ? "OL" : "UL");
      if (kind && list?.tagName !== kind) {
        list = make(kind);
        if (kind === "OL") list.start = parseInt(mark, 10);
        result.append(list);
      }
      if (!kind && line.trim()) list = null;
      if (kind) list.append(withSpans(make("li"), item));
      else if (line.trim()) result.append(withSpans(make("p"), line.replace(/^#{1,6}\s+(.*)$/, "**$1**")));
    }
  });
  return result;
}

function withSpans(parent, line) {
  for (const part of line.split(/(\*\*[^*]+\*\*|`[^`]+`)/)) {
    if (/^\*\*[^*]+\*\*$/.test(part)) parent.append(make("b", part.slice(2, -2)));
    else if (/^`[^`]+`$/.test(part)) parent.append(make("code", part.slice(1, -1)));
    else parent.append(part);
  }
  return parent;
}
