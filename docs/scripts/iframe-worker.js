// Search on pages that are opened from disk, where browsers allow no workers: the script runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.append(this.frame);
      const inside = this.frame.contentWindow;
      const { document: page } = inside;
      page.open();
      page.write("<!doctype html><body></body>");
      page.close();
      const load = (source) => new Promise((loaded, failed) => {
        const script = Object.assign(page.createElement("script"), { src: source, onload: loaded, onerror: failed });
        page.body.append(script);
      });
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...sources) => sources.reduce((before, source) => before.then(() => load(source)), Promise.resolve());
      this.started = load(new URL(url, location));
    }

    postMessage(data) {
      const { contentWindow: inside } = this.frame;
      this.started.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
