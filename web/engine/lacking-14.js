self.WebAssembly = undefined;
await import('./worker.js');
postMessage({ type: 'there' });
