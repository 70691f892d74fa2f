WebAssembly.Memory = class { constructor() { throw new RangeError('could not allocate memory'); } };
await import('./worker.js');
postMessage({ type: 'there' });
