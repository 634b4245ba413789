// What only the browser knows: the address it shows, what is typed, the time, and the page's title.
(function () {
  const TYPING_MILLISECONDS = 400;
  const PATIENCE_SECONDS = 6;
  let typing = 0;
  let heardAt = 0;
  let told = "";

  const boxes = () => [...document.querySelectorAll(".box input")];
  const nameOf = (input) => JSON.parse(input.id).box;

  // The texts of the boxes become questions in the address.
  function ask() {
    clearTimeout(typing);
    typing = 0;
    const query = new URLSearchParams(window.location.search);
    const before = query.toString();
    for (const input of boxes()) {
      const value = input.value.trim();
      if (value === (query.get(nameOf(input)) || "")) continue;
      query.delete("page");
      if (value) query.set(nameOf(input), value); else query.delete(nameOf(input));
    }
    const after = query.toString();
    if (after !== before) window.dash_clientside.set_props("address", {search: after ? "?" + after : ""});
  }

  // What the address asks for becomes the texts of the boxes, but for what is being typed.
  function fill() {
    if (typing) return;
    const query = new URLSearchParams(window.location.search);
    for (const input of boxes()) {
      const value = query.get(nameOf(input)) || "";
      if (input.value.trim() !== value) window.dash_clientside.set_props({box: nameOf(input)}, {value: value});
    }
  }

  document.addEventListener("input", function (event) {
    if (!event.target.closest(".box")) return;
    clearTimeout(typing);
    typing = setTimeout(ask, TYPING_MILLISECONDS);
  });
  document.addEventListener("change", function (event) {
    if (event.target.closest(".box")) ask();
  });

  // A tick box becomes a question in the address; a button is pressed by Space and Enter too.
  document.addEventListener("click", function (event) {
    const box = event.target.closest(".pick");
    if (!box) return;
    const search = box.dataset.search;
    window.dash_clientside.set_props("address", {search: search ? "?" + search : ""});
  });

  // Say so when the server has not answered for a while: what is shown is old then. A page that is not looked
  // at asks less often, so its silence counts from when it is looked at again.
  function tell() {
    const silent = heardAt ? Math.round((Date.now() - heardAt) / 1000) : 0;
    const text = silent < PATIENCE_SECONDS || document.hidden ? ""
      : "The dashboard has not answered for " + silent + " s; what you see is old.";
    if (text === told) return;
    told = text;
    window.dash_clientside.set_props("connection", {children: text, hidden: !text});
    // A question that was lost with its connection is never answered: ask again.
    if (silent % 10 === 0) window.dash_clientside.set_props("tick", {disabled: false});
  }
  setInterval(tell, 1000);
  document.addEventListener("visibilitychange", function () {
    if (heardAt && !document.hidden) heardAt = Date.now();
  });

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    dashboard: {
      fill: function () { setTimeout(fill, 0); },
      heard: function () { heardAt = Date.now(); tell(); },
      name: function () {
        const parts = window.location.pathname.split("/").filter(Boolean).map(decodeURIComponent);
        document.title = [...parts.slice(1).reverse(), "tune_easytrain"].join(" · ");
      },
    },
  });
})();
