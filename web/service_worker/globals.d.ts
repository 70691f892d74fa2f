/** What `aim web` writes above the service worker: the site that it is of. */
declare const SITE: {
  /** Changes with any file. */
  version: string;
  /** The page itself. */
  index: string;
  /** The folder of the page's modules, which the page of this version names. */
  page: string;
  /** What is kept at once, relative to the page. */
  shell: string[];
  /** Files that never change: sha256 in hexadecimal and size, by paths relative to the page. */
  files: Record<string, [string, number]>;
  /** The content security policy. */
  policy: string;
};
