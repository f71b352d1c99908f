// mkdocs-material 9.8 gives the search dialog no name, and what scrolls sideways cannot be reached with the keyboard: it makes
// the boxes around tables after this script has run, and takes the attribute from code on devices without a pointer that hovers.
document.querySelector('[data-md-component="search"]')?.setAttribute("aria-label", "Search");
const makeReachable = () => {
  for (const region of document.querySelectorAll(".md-typeset pre > code, .md-typeset pre, .md-typeset__scrollwrap")) {
    if (region.scrollWidth > region.clientWidth && !region.hasAttribute("tabindex")) {
      region.setAttribute("tabindex", "0");
    }
  }
};
new MutationObserver(makeReachable).observe(document.body, {
  subtree: true,
  childList: true,
  attributeFilter: ["tabindex"],
});
window.addEventListener("resize", makeReachable);
makeReachable();
