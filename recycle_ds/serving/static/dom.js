// Elements are made here, from text alone: nothing that a model or a user wrote is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

// make("p", {class: "soft"}, "text", child, ...); attributes that are null, undefined or false are left out
export function make(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

export function draw(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// For screen readers; short, and only at the start and the end of an answer
export function announce(text) {
  $("announce").textContent = text;
}

export function number(value, digits = 1) {
  return Number.isFinite(value) ? value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : "–";
}

export function percent(value, digits = 0) {
  return Number.isFinite(value) ? `${number(100 * value, digits)} %` : "–";
}

export function counted(count, noun) {
  return `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
}
