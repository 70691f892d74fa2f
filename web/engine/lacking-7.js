WebAssembly.validate = () => false;
await import('./worker.js');
postMessage({ type: 'there' });
