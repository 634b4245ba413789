// What only the browser knows: the address it shows, the time, and the page's title.
window.dash_clientside = Object.assign({}, window.dash_clientside, {
  dashboard: {
    // The texts of the boxes become questions in the address.
    ask: function (values, ids) {
      const query = new URLSearchParams(window.location.search);
      const before = query.toString();
      ids.forEach(function (id, place) {
        const value = (values[place] || "").trim();
        if (value === (query.get(id.box) || "")) return;
        query.delete("page");
        if (value) query.set(id.box, value); else query.delete(id.box);
      });
      const after = query.toString();
      if (after === before) return window.dash_clientside.no_update;
      return after ? "?" + after : "";
    },
    // Say so when the server has not answered for a while: what is shown is old then.
    connection: function (ticks, heard) {
      const silent = heard > 0 ? (Date.now() - heard) / 1000 : 0;
      if (silent < 6) return ["", true];
      return ["The dashboard has not answered for " + Math.round(silent) + " s; what you see is old.", false];
    },
    name: function () {
      const parts = window.location.pathname.split("/").filter(Boolean).map(decodeURIComponent);
      document.title = [...parts.slice(1).reverse(), "tune_easytrain"].join(" · ");
      return window.dash_clientside.no_update;
    },
  },
});
