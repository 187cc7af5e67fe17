// Create elements. Text from a model or a user is never parsed as HTML.

export const element = id => document.getElementById(id);

export function make(tag, text, className) {
  const made = document.createElement(tag);
  made.textContent = text ?? "";
  if (className) made.className = className;
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

// Render a subset of Markdown: code blocks, lists, headings, bold and inline code. The rest stays plain text.
export function rendered(text) {
  const result = document.createDocumentFragment();
  text.split(/^```.*$/m).forEach((part, number) => {
    const content = part.replace(/^\n|\n$/g, "");
    if (number % 2) {
      result.append(make("pre", content));
      return;
    }
    let block = null; // a list, or a paragraph of several lines
    for (const line of content.split("\n")) {
      const [, mark, item] = line.match(/^\s*([-*]|\d+[.)])\s+(.*)$/) ?? [];
      const kind = !mark ? "P" : /\d/.test(mark) ? "OL" : "UL";
      if (!line.trim()) {
        if (block?.tagName === "P") block = null;
        continue;
      }
      if (block?.tagName !== kind) {
        block = make(kind);
        if (kind === "OL") block.start = parseInt(mark, 10);
        result.append(block);
      } else if (kind === "P") block.append("\n");
      if (kind === "P") withSpans(block, line.replace(/^#{1,6}\s+(.*)$/, "**$1**"));
      else block.append(withSpans(make("li"), item));
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
