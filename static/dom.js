// What comes from a message enters the page by textContent, or by attributes that hold no code.

export const byId = (id) => document.getElementById(id);

/** Set a node's text; one that has it already is left alone, with what is selected in it. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function element(tag, className = "", ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/** Let screen readers say a text. */
export function announce(text) {
  byId("announcer").textContent = text;
}

export function save(name, type, text) {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], {type}));
  link.download = name;
  link.click();
}
