addEventListener("keydown", event => {
  const way = {ArrowLeft: "previousElementSibling", ArrowRight: "nextElementSibling"}[event.key], from = event.target;
  if (!way || !from.matches("article .t")) return;
  let to = from[way];
  while (to && !to.matches(".t")) to = to[way];
  if (!to) return;
  [from.tabIndex, to.tabIndex] = [-1, 0];
  to.focus();
  event.preventDefault();
});
