// mkdocs-material 9.8 gives the search dialog no name, and what scrolls sideways cannot be reached with the keyboard.
document.querySelector('[data-md-component="search"]')?.setAttribute("aria-label", "Search");
for (const region of document.querySelectorAll(".md-typeset pre > code, .md-typeset pre, .md-typeset__scrollwrap")) {
  region.setAttribute("tabindex", "0");
}
