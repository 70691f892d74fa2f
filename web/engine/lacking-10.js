Object.defineProperty(self.crypto, 'subtle', { value: undefined });
await import('./worker.js');
postMessage({ type: 'there' });
